"""What launch.export writes around the weights of a transfer model, so that the folder explains itself and runs in PyTorch."""
