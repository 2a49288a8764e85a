"""What the five scripts are built on: modules shared by all of them here, one subpackage for each script."""
