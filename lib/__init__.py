"""What the scripts share; CONTRIBUTING.md says which file owns what."""
