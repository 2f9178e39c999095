"""The controller's decisions: events in, actions out. Pure: no Ray, no clock, no I/O."""
