"""What tests share: tiny models and data, worlds of several processes, stand-ins."""
