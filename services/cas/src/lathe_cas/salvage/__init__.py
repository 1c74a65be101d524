"""``lathe-cas fsck --salvage``: what is whole of a damaged store, into a new one."""
