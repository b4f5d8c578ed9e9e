"""Pure tensor functions: every formula of every paper, cited and tested."""
