"""``lathe-cas fsck``: check a store, and drop what is bad."""
