"""What several test modules share. No doubles of our own parts: real Redis, real processes, shipped fakes."""
