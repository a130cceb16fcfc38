"""Where answers come from: the local engine, or a server."""
