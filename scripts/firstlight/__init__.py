"""Host side of Firstlight: sets the machine up, builds, boots, measures and tests the kernel."""
