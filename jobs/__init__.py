"""Entry points and manifests for Ray Jobs and KubeRay."""
