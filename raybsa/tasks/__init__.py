"""What a pattern is judged on: quality by training a small model, speed and memory by attention alone."""
