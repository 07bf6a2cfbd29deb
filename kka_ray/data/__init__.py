"""Normal images in: splits that cannot leak, captions, one file a data set."""
