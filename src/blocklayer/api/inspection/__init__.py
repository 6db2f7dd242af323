"""Looking at images that nobody vouches for, without believing or following anything in them."""
