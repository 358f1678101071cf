"""The decode loop: slots, ragged passes, keyed sampling, verification."""
