"""Jobs for Ray, and the program behind `make demo`."""
