"""What is learned: arithmetic, GSM8K, and the small policies made for it."""
