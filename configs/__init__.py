"""Every number of the project: one file per run, `get_config(variant)`."""
