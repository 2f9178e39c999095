"""The brain of a run: a pure state machine. Events in, actions out; no Ray, no clock, no I/O of its own."""
