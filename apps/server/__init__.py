"""What `soundwave serve` is made of: the guard at the door, the lanes of work, and one handler per route."""
