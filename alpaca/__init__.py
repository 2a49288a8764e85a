"""What the five scripts stand on: shared rooms here, one folder for each script's own."""
