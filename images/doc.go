// Package images serves the CRI ImageService and gives containers their root filesystems: it pulls images from
// registries, unpacks and keeps their layers, imports archives, and mounts what a container needs.
//
// There are five nouns. A reference names an image in a registry. A layer is one unpacked change set, a directory
// named by its diffID: it knows nothing of the layers beneath it, so layers are fetched and unpacked in parallel
// and shared by every image that has them. An image record ties a config digest (the image's id) to its names
// and its layers. A rootfs is an overlay of an image's layers under a writable directory, one a container. The
// Store holds all of them; Service is its CRI face.
//
// # On disk
//
//	lock                 flock of the one process that writes here
//	tmp/                 half-done work and what is being deleted; emptied on Open
//	layers/sha256-HEX/   diff/ is the tree, layer.json its record
//	images/HEX.json      an image record
//	fix/HEX/             directories whose metadata a layer left out (see fixup.go); only where there are any
//	rootfs/ID/           rootfs.json, upper, work, merged: a container's root filesystem
//	volumes/ID/          the same without upper and work: an image mounted as a volume
//	corrupt/             records that could not be read, set aside
//
// The root is 0700: layers hold setuid programs, which outside of the user namespace are setuid to the user.
//
// Everything is made in tmp and renamed into place when it is whole, so SIGKILL at any point leaves either the
// whole or something in tmp. See sync.go for what a power cut may leave and how it is found.
//
// # Who owns what
//
// The Store owns every file under its root and two background goroutines, one that syncs layers (sync.go) and one that
// measures what containers write (usage.go); Close waits for them. Mounts outlive the process: their records say which
// layers they need, and Open reads them back.
//
// Lock order: Store.writeMu (one change of the records at a time; held while writing to disk), then Store.mu (the
// index in memory; never held while waiting for the disk, except for renames). The locks of a flightGroup, of the
// meter and of the mounter stand alone. Reads take Store.mu for reading and return copies.
package images
