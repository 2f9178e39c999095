"""The thin adapter between Ray's world and the controller's events and actions. The only room that imports ray."""
