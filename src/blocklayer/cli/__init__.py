"""The command line: `blk`, its groups of commands, and what every command shares."""
