"""How the server combines what sites send, and what it refuses."""
