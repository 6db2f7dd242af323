"""Speed, as ratios: our program and the peer it is measured against, run in turns on one machine."""
