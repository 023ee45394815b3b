"""What ``tune`` searches, and the study that remembers it."""
