package images

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// refusedPull pulls an image through the CRI, which must fail with the code and the words, and leave nothing.
func refusedPull(t *testing.T, s *Store, ref string, code codes.Code, words ...string) {
	t.Helper()
	_, err := NewService(s).PullImage(context.Background(), &runtimeapi.PullImageRequest{Image: spec(ref)})
	if status.Code(err) != code {
		t.Errorf("%v: want %s", err, code)
	}
	for _, w := range words {
		if err == nil || !strings.Contains(err.Error(), w) {
			t.Errorf("%v: it does not say %q", err, w)
		}
	}
	expectEmpty(t, s)
}

// expectEmpty: neither the disk nor the memory of the store has anything of an image.
func expectEmpty(t *testing.T, s *Store) {
	t.Helper()
	settle(s)
	for _, d := range []string{"tmp", "layers", "images", "fix", "rootfs", "volumes", "corrupt"} {
		entries, err := os.ReadDir(s.path(d))
		if err != nil || len(entries) > 0 {
			t.Errorf("%s has %v, %v", d, entries, err)
		}
	}
	if images, layers, _ := s.index.counts(); images+layers > 0 {
		t.Errorf("%d images and %d layers are known", images, layers)
	}
}

// TestHostileLayersAreRefused: what no image needs and only serves to harm, through the whole path of a pull.
func TestHostileLayersAreRefused(t *testing.T) {
	many := make([]entry, 0, 300)
	for i := range 300 {
		many = append(many, file(fmt.Sprint("f", i), ""))
	}
	deep := []entry{symlink("l0", strings.Repeat("d/", 400)+"e")}
	deep = append(deep, file("l0/x", ""), symlink("l1", "l0/"+strings.Repeat("d/", 400)+"e"), file("l1/y", ""))
	for name, c := range map[string]struct {
		compressed string
		entries    []entry
		code       codes.Code
		says       string
	}{
		"gzip bomb":                {compressedGzip, []entry{file("zeros", strings.Repeat("\x00", 8<<20))}, codes.FailedPrecondition, "images.maxLayerBytes"},
		"zstd bomb":                {compressedZstd, []entry{file("zeros", strings.Repeat("\x00", 8<<20))}, codes.FailedPrecondition, "images.maxLayerBytes"},
		"many entries":             {compressedGzip, many, codes.FailedPrecondition, "images.maxLayerEntries"},
		"many directories":         {compressedGzip, []entry{file(strings.Repeat("d/", 300)+"f", ""), file("g", "")}, codes.FailedPrecondition, "images.maxLayerEntries"},
		"deep directories":         {compressedGzip, []entry{file(strings.Repeat("d/", 600)+"f", "")}, codes.FailedPrecondition, "nested"},
		"deep by links":            {compressedGzip, deep, codes.FailedPrecondition, ""},
		"name of 4096 bytes":       {compressedGzip, []entry{file(strings.Repeat(strings.Repeat("n", 255)+"/", 16)+"f", "")}, codes.FailedPrecondition, "longer than 4096 bytes"},
		"link to 4096 bytes":       {compressedGzip, []entry{symlink("l", strings.Repeat("n", 4096))}, codes.FailedPrecondition, "longer than 4096 bytes"},
		"component of 256 bytes":   {compressedGzip, []entry{file(strings.Repeat("n", 256), "")}, codes.FailedPrecondition, "file name too long"},
		"under a file":             {compressedGzip, []entry{file("f", ""), file("f/x", "")}, codes.FailedPrecondition, "not a directory"},
		"loop of links":            {compressedGzip, []entry{symlink("a", "b"), symlink("b", "a"), file("a/x", "")}, codes.FailedPrecondition, "too many levels"},
		"hard link out":            {compressedGzip, []entry{hardlink("leak", "../../../../../../etc/passwd")}, codes.FailedPrecondition, "no such file"},
		"hard link to a directory": {compressedGzip, []entry{dir("d", 0o755), hardlink("h", "d")}, codes.FailedPrecondition, "not permitted"},
		"whiteout of no name":      {compressedGzip, []entry{whiteout(".wh...")}, codes.FailedPrecondition, "whiteout of no name"},
		"below a whiteout":         {compressedGzip, []entry{file(".wh.etc/passwd", "")}, codes.FailedPrecondition, "name of a whiteout"},
		"below a whiteout of ..":   {compressedGzip, []entry{file(".wh.../x", "")}, codes.FailedPrecondition, "name of a whiteout"},
		"whiteout by a link":       {compressedGzip, []entry{symlink("l", ".wh.../x"), file("l/y", "")}, codes.FailedPrecondition, "name of a whiteout"},
		"large attribute": {compressedGzip, []entry{{name: "f", kind: '0', mode: 0o644, pax: map[string]string{"SCHILY.xattr.user.a": strings.Repeat("v", 70_000)}}},
			codes.FailedPrecondition, "attribute user.a of 70000 bytes"},
		"long attribute": {compressedGzip, []entry{{name: "f", kind: '0', mode: 0o644, pax: map[string]string{"SCHILY.xattr.user." + strings.Repeat("n", 9000): "v"}}},
			codes.FailedPrecondition, "attribute"},
	} {
		t.Run(name, func(t *testing.T) {
			h, s := newHub(t), openStore(t, Config{MaxLayerBytes: 4 << 20, MaxLayerEntries: 250})
			if strings.HasPrefix(name, "deep") {
				s.cfg.MaxLayerEntries = DefaultMaxLayerEntries
			}
			// Another layer comes in meanwhile, or before: it must not stay.
			h.push(t, "bad:1", imageOf(t, gzipLayer(t, file("good", "x")), layerOf(t, c.compressed, c.entries...)))
			refusedPull(t, s, h.host+"/bad:1", c.code, c.says)
		})
	}
}

// TestWhatIsNoLayerIsRefused: blobs whose digests are right and that no tar reader takes.
func TestWhatIsNoLayerIsRefused(t *testing.T) {
	record := append(ustar("pax", 'x', 2<<20), make([]byte, 2<<20)...)
	good := archiveOf(t, file("f", strings.Repeat("x", 5000)))
	gzipped := compressLayer(t, compressedGzip, good)
	for name, l := range map[string]*testLayer{
		"huge PAX record": compressLayer(t, compressedGzip, record),
		"noise":           compressLayer(t, "", []byte(strings.Repeat("this is no archive", 100))),
		"cut archive":     compressLayer(t, compressedZstd, good[:1500]),
		"cut gzip":        {blob: gzipped.blob[:len(gzipped.blob)-9], diffID: gzipped.diffID, mediaType: types.OCILayer},
		"gzip of nothing": {blob: []byte{0x1f, 0x8b, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, diffID: gzipped.diffID, mediaType: types.OCILayer},
		"zstd of nothing": {blob: []byte{0x28, 0xb5, 0x2f, 0xfd, 0xff, 0xff, 0xff, 0xff, 0xff}, diffID: gzipped.diffID, mediaType: types.OCILayerZStd},
	} {
		t.Run(name, func(t *testing.T) {
			h, s := newHub(t), openStore(t, Config{})
			h.push(t, "bad:1", imageOf(t, l))
			refusedPull(t, s, h.host+"/bad:1", codes.DataLoss, "layer cannot be read")
		})
	}
}

// lie is a layer that is described otherwise than it is.
func lie(l *testLayer, change func(l *testLayer)) *testLayer {
	other := *l
	change(&other)
	return &other
}

func TestHostileManifestsAreRefused(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{MaxLayerBytes: 1 << 20})
	good := gzipLayer(t, file("a", "x"))
	h.push(t, "diffid:1", imageOf(t, lie(good, func(l *testLayer) { l.diffID = sum([]byte("other")) })))
	refusedPull(t, s, h.host+"/diffid:1", codes.DataLoss, "digest mismatch", "configuration says")

	layers := make([]*testLayer, 1000)
	for i := range layers {
		layers[i] = good
	}
	h.push(t, "layers:1", imageOf(t, layers...))
	h.intercept(nil)
	refusedPull(t, s, h.host+"/layers:1", codes.FailedPrecondition, "1000 layers")
	if got := h.seen(sum(good.blob)); len(got) > 0 {
		t.Errorf("a layer was fetched: %v", got)
	}

	index := v1.ImageIndex(empty.Index)
	platform := &v1.Platform{OS: "linux", Architecture: runtime.GOARCH}
	index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: imageOf(t, good), Descriptor: v1.Descriptor{Platform: platform}})
	for range 8 {
		index = mutate.AppendManifests(mutate.IndexMediaType(empty.Index, types.OCIImageIndex), mutate.IndexAddendum{Add: index, Descriptor: v1.Descriptor{Platform: platform}})
	}
	h.pushIndex(t, "nested:1", index)
	refusedPull(t, s, h.host+"/nested:1", codes.FailedPrecondition, "indexes in each other")

	annotated, ok := mutate.Annotations(imageOf(t, good), map[string]string{"a": strings.Repeat("v", 1<<20)}).(v1.Image)
	if !ok {
		t.Fatal("no image")
	}
	h.push(t, "annotations:1", annotated)
	refusedPull(t, s, h.host+"/annotations:1", codes.FailedPrecondition, "annotations")
	h.push(t, "user:1", imageWith(t, v1.Config{User: strings.Repeat("u", 1<<20)}, good))
	refusedPull(t, s, h.host+"/user:1", codes.FailedPrecondition, "user")

	// One that says of itself to be larger than the store takes is not even begun.
	h.push(t, "large:1", imageOf(t, layerOf(t, "", file("f", strings.Repeat("x", 2<<20)))))
	h.intercept(nil)
	refusedPull(t, s, h.host+"/large:1", codes.FailedPrecondition, "images.maxLayerBytes")
	if got := h.seen("/blobs/"); len(got) != 1 {
		t.Errorf("more than the configuration was fetched: %v", got)
	}
}

// odd is a name that is not UTF-8, and one that looks like the end of a directory's path.
const odd = "\xff\xfe odd\n"

// TestNamesThatAreNotUTF8: a layer with any names that the kernel takes is unpacked, written out, read back, mounted
// and removed.
func TestNamesThatAreNotUTF8(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	l := gzipLayer(t, file("d"+odd+"/sub/f"+odd, "content"), entry{name: "d" + odd + "/own", kind: '5', mode: 0o700}, symlink("l"+odd, "d"+odd))
	below := gzipLayer(t, entry{name: "d" + odd, kind: '5', mode: 0o1777})
	h.push(t, "odd:1", imageOf(t, below, l))
	pull(t, s, h.host+"/odd:1")
	waitSynced(t, s)
	if got := s.index.layer(l.diffID).impliedDirs(); len(got) != 2 || got[0] != "d"+odd {
		t.Errorf("implied directories %q", got)
	}
	s = reopen(t, s)
	// The same layers in another image: the fix is made of what was read back.
	h.push(t, "odd:2", imageWith(t, v1.Config{User: "5"}, below, l))
	pull(t, s, h.host+"/odd:2")
	root := mount(t, s, "c1", h.host+"/odd:2")
	if got := read(t, filepath.Join(root, "l"+odd, "sub", "f"+odd)); got != "content" {
		t.Errorf("content %q", got)
	}
	if st := lstat(t, filepath.Join(root, "d"+odd)); st.Mode&0o7777 != 0o1777 {
		t.Errorf("the directory that one layer describes and the other implies has mode %o", st.Mode)
	}
	if err := s.UnmountRootfs("c1"); err != nil {
		t.Error(err)
	}
	for _, tag := range []string{":1", ":2"} {
		if err := s.Remove(h.host + "/odd" + tag); err != nil {
			t.Error(err)
		}
	}
	expectEmpty(t, s)
}

// TestCopiesTakeNoDirectoryForAWhiteout: a directory of an older store with the name of a whiteout of ".." must not
// make the copy remove what is beside the root filesystem.
func TestCopiesTakeNoDirectoryForAWhiteout(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	s.mounter = mounter{driver: driverCopy}
	l := gzipLayer(t, file("f", "x"))
	h.push(t, "app:1", imageOf(t, l))
	pull(t, s, h.host+"/app:1")
	other := mount(t, s, "other", h.host+"/app:1")
	for _, bad := range []string{".wh...", ".wh..", ".wh."} {
		path := filepath.Join(s.layerDir(l.diffID), "diff", bad)
		if err := os.Mkdir(path, 0o755); err != nil {
			t.Fatal(err)
		}
		if _, err := s.MountRootfs(context.Background(), "c1", h.host+"/app:1"); !errors.Is(err, ErrRefused) {
			t.Errorf("%s: %v", bad, err)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	if read(t, filepath.Join(other, "f")) != "x" {
		t.Error("another root filesystem was changed")
	}
}

// TestTheLongestNames: a name of as many bytes as a path may have, and directories as deep as they may be, are unpacked,
// written out and removed.
func TestTheLongestNames(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	long := strings.Repeat(strings.Repeat("n", 254)+"/", 16) + strings.Repeat("f", 15)
	l := gzipLayer(t, file(long, "x"), file(strings.Repeat("d/", maxDepth)+"f", "y"))
	if len(long) != maxPath-1 {
		t.Fatalf("%d bytes", len(long))
	}
	h.push(t, "app:1", imageOf(t, l))
	pull(t, s, h.host+"/app:1")
	waitSynced(t, s)
	if err := s.Remove(h.host + "/app:1"); err != nil {
		t.Fatal(err)
	}
	expectEmpty(t, s)
}

// TestReplacedDirectories: a directory that is replaced takes along what is known of everything in it, by whatever name
// it came, and nothing else.
func TestReplacedDirectories(t *testing.T) {
	var entries []entry
	for i := range 300 {
		entries = append(entries, dir(fmt.Sprintf("keep/d%d", i), 0o711), dir("x", 0o700), file("x/in/f", "old"), file("x", "a file"))
	}
	entries = append(entries, dir("x", 0o750), file("x/new", "n"), symlink("l", "."), file("l/l", "instead of the link"), file("after", "a"))
	root, rec := mustUnpack(t, entries...)
	if got := read(t, filepath.Join(root, "l")); got != "instead of the link" {
		t.Errorf("l = %q", got)
	}
	for path, mode := range map[string]uint32{"x": unix.S_IFDIR | 0o750, "keep/d0": unix.S_IFDIR | 0o711, "keep/d299": unix.S_IFDIR | 0o711} {
		if st := lstat(t, filepath.Join(root, path)); st.Mode != mode {
			t.Errorf("%s has mode %o, want %o", path, st.Mode, mode)
		}
	}
	if exists(filepath.Join(root, "x/in")) || strings.Join(rec.impliedDirs(), " ") != "keep" {
		t.Errorf("implied directories %q", rec.impliedDirs())
	}
	if raw, err := json.Marshal(rec); err != nil || len(raw) > 4096 {
		t.Errorf("a record of %d bytes, %v", len(raw), err)
	}
}

// TestAModelOfManyLayersFits into the limit that nobody has set.
func TestAModelOfManyLayersFits(t *testing.T) {
	s := openStore(t, Config{})
	layer := layerWant{DiffID: sum(nil), Size: 30 << 30}
	within, err := s.roomFor([]layerWant{layer, layer, layer})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		l := share{of: within}
		if err := errors.Join(l.readMore(31<<30), l.fileOf(30<<30)); err != nil {
			t.Error(err)
		}
	}
}

// TestAnImageIsLimitedAsAWhole: layers that would each do are refused together, with nothing left; what is here already, and
// an attempt that failed, takes nothing of the limit.
func TestAnImageIsLimitedAsAWhole(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{MaxLayerBytes: 4 << 20, MaxLayerEntries: 250})
	large := func(name string) *testLayer { return gzipLayer(t, file(name, strings.Repeat("\x00", 3<<19))) }
	many := func(name string) *testLayer {
		var entries []entry
		for i := range 100 {
			entries = append(entries, file(fmt.Sprint(name, i), ""))
		}
		return gzipLayer(t, entries...)
	}
	hole := func(name string) *testLayer {
		return compressLayer(t, "", append(archiveOf(t, file(name, ""))[:512], sparseArchive(3<<19)...))
	}
	for tag, c := range map[string]struct {
		layer func(string) *testLayer
		key   string
	}{"bytes": {large, "images.maxLayerBytes"}, "holes": {hole, "images.maxLayerBytes"}, "entries": {many, "images.maxLayerEntries"}} {
		h.push(t, tag+":1", imageOf(t, c.layer("a"), c.layer("b"), c.layer("c")))
		refusedPull(t, s, h.host+"/"+tag+":1", codes.FailedPrecondition, c.key)
	}
	// By their own account, before anything is fetched.
	h.push(t, "large:1", imageOf(t, layerOf(t, "", file("d", noise(3<<20))), layerOf(t, "", file("e", noise(2<<20)))))
	h.intercept(nil)
	refusedPull(t, s, h.host+"/large:1", codes.FailedPrecondition, "images.maxLayerBytes")
	if got := h.seen("/blobs/"); len(got) != 1 {
		t.Errorf("more than the configuration was fetched: %v", got)
	}

	h.push(t, "two:1", imageOf(t, large("a"), large("b")))
	h.push(t, "four:1", imageOf(t, large("a"), large("b"), large("c"), large("d")))
	pull(t, s, h.host+"/two:1")
	pull(t, s, h.host+"/four:1")

	within, l := s.newRoom(), large("e")
	for range 3 {
		bad := layerWant{DiffID: sum(nil), Digest: sum(l.blob), Size: int64(len(l.blob))}
		if _, err := s.unpackLayer(context.Background(), t.TempDir(), bad, within, bytes.NewReader(l.blob)); !errors.Is(err, ErrDigest) {
			t.Errorf("error = %v", err)
		}
	}
	if within.stream.Load() != 0 || within.content.Load() != 0 || within.entries.Load() != 0 {
		t.Error("what failed is still counted")
	}
	if _, err := s.unpackLayer(context.Background(), t.TempDir(), layerWant{DiffID: l.diffID, Size: -1}, within, bytes.NewReader(l.blob)); err != nil {
		t.Error(err)
	}
	if within.stream.Load() == 0 || within.content.Load() == 0 || within.entries.Load() != 1 {
		t.Error("what is there is not counted")
	}
}
