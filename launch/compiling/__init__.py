"""What launch.compile compiles."""
