package images

const crashEnv = "CORACLE_IMAGES_CRASH"

func crashChild() {}
