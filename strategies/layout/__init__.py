"""Who computes and holds what: layouts, schedules, assignment of work, placement of state. No torch."""
