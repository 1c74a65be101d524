"""What Lathe's services have in common; each module is named for what it holds."""
