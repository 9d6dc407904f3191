"""What launch.sample does, one file for each kind of configuration that has a road of its own."""
