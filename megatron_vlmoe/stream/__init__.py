"""What a micro-batch is: its segments, which block reads which, sizes, random draws."""
