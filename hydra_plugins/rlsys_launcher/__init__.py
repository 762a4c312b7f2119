"""Found by Hydra wherever rlsys is installed: the launcher of its sweeps."""
