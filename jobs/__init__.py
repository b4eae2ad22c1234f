"""What a user submits to Ray, or starts by `make demo`."""
