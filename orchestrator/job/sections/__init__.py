"""The sections of a job file: every field, its default, its unit and the values it takes on its own; a file each."""
