"""What `serve run` and `serve deploy` import. Ray's own package is `ray.serve`; the two do not meet."""
