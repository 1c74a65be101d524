"""What tests of several services need; production code never imports it."""
