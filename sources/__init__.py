"""Where pictures, captions and regions come from. Nothing here knows a model, a split or the settings."""
