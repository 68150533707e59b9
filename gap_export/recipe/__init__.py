"""What a build is told."""
