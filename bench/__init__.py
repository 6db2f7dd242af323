"""Speed, as ratios: our program and the peer that it is measured against, run in turns."""
