"""Processes and their lives, whatever they work at: who is asked for, placed, warm, draining, silent, gone.

What they work at is decided by a machine (`orchestrator.control.core.machine`) that is built on this room, such as
training's; this room knows none of them.
"""
