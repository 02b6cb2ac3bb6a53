"""The U-Net and its sub-networks."""
