"""What a run will need: tokens, bytes, memory, hours and money, before it starts."""
