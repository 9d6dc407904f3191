"""The files of launch.recipe, as templates: one folder a target."""
