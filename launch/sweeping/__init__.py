"""What launch.sweep is made of: the space, the plan, trials and their folders, engines, and the page of what came out."""
