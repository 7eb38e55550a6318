"""What `rtdmd doctor` looks at: the machine and the software on it, one check a line."""
