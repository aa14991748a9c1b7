"""Reading and writing the published checkpoints (-Paddle and -PT layouts)."""
