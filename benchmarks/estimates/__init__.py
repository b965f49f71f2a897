"""What `retort estimate` says beside what was taken."""
