package images

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/rootless/nstest"
)

// unpackTo unpacks one archive below a directory with a canary outside, and returns the layer's root.
func unpackTo(t *testing.T, cfg Config, entries ...entry) (string, *layerRecord, error) {
	t.Helper()
	return unpackRaw(t, cfg, archiveOf(t, entries...))
}

func unpackRaw(t *testing.T, cfg Config, raw []byte) (string, *layerRecord, error) {
	t.Helper()
	s := openStore(t, cfg)
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "canary"), []byte("alive"), 0o644); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(outside, "layer")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	rec, err := s.unpackLayer(context.Background(), dir, layerWant{DiffID: sum(raw), Size: -1}, s.newRoom(), bytes.NewReader(raw))
	entries, readErr := os.ReadDir(outside)
	if readErr != nil {
		t.Fatal(readErr)
	}
	if len(entries) != 2 || read(t, filepath.Join(outside, "canary")) != "alive" {
		t.Fatalf("the layer reached outside of its root: %v", entries)
	}
	return filepath.Join(dir, "diff"), rec, err
}

func mustUnpack(t *testing.T, entries ...entry) (string, *layerRecord) {
	t.Helper()
	root, rec, err := unpackTo(t, Config{}, entries...)
	if err != nil {
		t.Fatal(err)
	}
	return root, rec
}

func lstat(t *testing.T, path string) unix.Stat_t {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatalf("lstat %s: %v", path, err)
	}
	return st
}

func TestHostileNamesStayInside(t *testing.T) {
	root, _ := mustUnpack(t,
		file("../canary", "dot dot"),
		file("../../../../../../../../etc/passwd-coracle", "deep"),
		file("/absolute", "absolute"),
		symlink("up", ".."),
		file("up/canary", "through a relative link"),
		symlink("abs", "/"),
		file("abs/via-abs", "through an absolute link"),
		symlink("magic", "/proc/self/root"),
		file("magic/x", "through a magic link"),
		symlink("chain1", "chain2"), symlink("chain2", "../../.."),
		file("chain1/chained", "through a chain"),
		dir("d", 0o755), symlink("d/out", "../../../.."),
		file("d/out/from-d", "through a link in a directory"),
		symlink("dangling", "../../outside/new"),
		file("dangling/made", "a missing directory through a link"),
	)
	for path, want := range map[string]string{
		"etc/passwd-coracle": "deep", "absolute": "absolute", "canary": "through a relative link",
		"via-abs": "through an absolute link", "chained": "through a chain", "from-d": "through a link in a directory",
		"outside/new/made": "a missing directory through a link", "proc/self/root/x": "through a magic link",
	} {
		if got := read(t, filepath.Join(root, path)); got != want {
			t.Errorf("%s = %q, want %q", path, got, want)
		}
	}
	if exists("/etc/passwd-coracle") {
		t.Error("wrote to the machine's /etc")
	}
}

func TestLinksAreReplacedAndNotFollowed(t *testing.T) {
	target := filepath.Join(t.TempDir(), "target")
	if err := os.WriteFile(target, []byte("untouched"), 0o644); err != nil {
		t.Fatal(err)
	}
	root, _ := mustUnpack(t,
		symlink("f", target), file("f", "a file instead of the link"),
		symlink("d", filepath.Dir(target)), dir("d", 0o700), file("d/target", "in a directory instead of the link"),
		symlink("w", filepath.Dir(target)), whiteout("w/.wh.target"),
	)
	if got := read(t, target); got != "untouched" {
		t.Errorf("the link's target = %q", got)
	}
	if got := read(t, filepath.Join(root, "f")); got != "a file instead of the link" {
		t.Errorf("f = %q", got)
	}
	if st := lstat(t, filepath.Join(root, "d")); st.Mode != unix.S_IFDIR|0o700 {
		t.Errorf("d has mode %o", st.Mode)
	}
}

func TestHardLinksStayInside(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, entries := range map[string][]entry{
		"absolute":             {hardlink("leak", secret)},
		"dot dot":              {hardlink("leak", strings.Repeat("../", 20)+strings.TrimPrefix(secret, "/"))},
		"through a link":       {symlink("door", filepath.Dir(secret)), hardlink("leak", "door/secret")},
		"to a missing file":    {hardlink("leak", "nothing")},
		"to a directory":       {dir("d", 0o755), hardlink("leak", "d")},
		"to the root":          {hardlink("leak", "/")},
		"to itself":            {file("leak", "x"), hardlink("leak", "./leak")},
		"through a magic link": {symlink("door", "/proc/self/fd"), hardlink("leak", "door/0")},
	} {
		t.Run(name, func(t *testing.T) {
			root, _, err := unpackTo(t, Config{}, entries...)
			if err == nil {
				t.Errorf("no error; leak exists: %v", exists(filepath.Join(root, "leak")))
			}
		})
	}
	// A link to a symbolic link names the link, not what it leads to.
	root, _ := mustUnpack(t, symlink("s", secret), hardlink("h", "s"))
	if st := lstat(t, filepath.Join(root, "h")); st.Mode&unix.S_IFMT != unix.S_IFLNK {
		t.Errorf("hard link to a symbolic link has mode %o", st.Mode)
	}
	root, _ = mustUnpack(t, file("a", "1"), file("b", "2"), hardlink("b", "a"), hardlink("b", "a"), dir("x", 0o755), file("x/y", ""), hardlink("x", "a"))
	if a, b, x := lstat(t, root+"/a"), lstat(t, root+"/b"), lstat(t, root+"/x"); a.Ino != b.Ino || a.Ino != x.Ino || a.Nlink != 3 {
		t.Errorf("inodes %d %d %d, %d names", a.Ino, b.Ino, x.Ino, a.Nlink)
	}
}

func TestLaterEntriesWin(t *testing.T) {
	root, _ := mustUnpack(t,
		file("a", "first"), file("a", "second"),
		dir("b", 0o755), file("b/inside", "x"), file("b", "a file now"),
		file("c", "x"), dir("c", 0o711), file("c/inside", "y"),
		dir("d", 0o755), file("d/kept", "k"), dir("d", 0o700),
		dir("e", 0o755), file("e/x", "old"), symlink("e", "d"), file("e/through", "t"),
		symlink("g", "d"), file("g/one", "1"), symlink("g", "c"), file("g/two", "2"),
	)
	for path, want := range map[string]string{"a": "second", "b": "a file now", "c/inside": "y", "d/kept": "k", "d/through": "t", "d/one": "1", "c/two": "2"} {
		if got := read(t, filepath.Join(root, path)); got != want {
			t.Errorf("%s = %q, want %q", path, got, want)
		}
	}
	if st := lstat(t, root+"/d"); st.Mode&0o7777 != 0o700 {
		t.Errorf("d has mode %o, want the last", st.Mode)
	}
	if exists(root + "/d/x") {
		t.Error("d/x came through a link that was made later")
	}
}

func TestAttributes(t *testing.T) {
	capability := "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	root, rec := mustUnpack(t,
		entry{name: "./", kind: tar.TypeDir, mode: 0o1751, uid: 7, gid: 8},
		entry{name: "setuid", kind: tar.TypeReg, mode: 0o6755, body: "x"},
		entry{name: "sticky", kind: tar.TypeDir, mode: 0o3777, gid: 42},
		entry{name: "sticky/inherits-nothing", kind: tar.TypeReg, mode: 0o644},
		entry{name: "closed", kind: tar.TypeDir, mode: 0},
		file("closed/inside", "x"),
		entry{name: "owned", kind: tar.TypeReg, mode: 0o640, uid: 1000, gid: 65534},
		entry{name: "link", kind: tar.TypeSymlink, link: "owned", uid: 3, gid: 4},
		entry{name: "cap", kind: tar.TypeReg, mode: 0o755, body: "x", uid: 1, pax: map[string]string{"SCHILY.xattr.security.capability": capability, "SCHILY.xattr.user.note": "hi"}},
		entry{name: "overlay", kind: tar.TypeDir, mode: 0o755, pax: map[string]string{"SCHILY.xattr.user.overlay.opaque": "y", "SCHILY.xattr.user.overlay.redirect": "/etc"}},
		entry{name: "trusted", kind: tar.TypeReg, mode: 0o644, pax: map[string]string{"SCHILY.xattr.trusted.x": "1"}},
		entry{name: "fifo", kind: tar.TypeFifo, mode: 0o622},
		entry{name: "null", kind: tar.TypeChar, mode: 0o666},
		entry{name: "disk", kind: tar.TypeBlock, mode: 0o660},
	)
	for path, want := range map[string]uint32{
		"setuid": unix.S_IFREG | 0o6755, "sticky": unix.S_IFDIR | 0o3777, "sticky/inherits-nothing": unix.S_IFREG | 0o644,
		"closed": unix.S_IFDIR, "fifo": unix.S_IFIFO | 0o622, ".": unix.S_IFDIR | 0o1751,
	} {
		if st := lstat(t, filepath.Join(root, path)); st.Mode != want {
			t.Errorf("%s has mode %o, want %o", path, st.Mode, want)
		}
	}
	if st := lstat(t, root+"/sticky/inherits-nothing"); st.Gid != 0 {
		t.Errorf("a file in a setgid directory has group %d", st.Gid)
	}
	for _, path := range []string{"setuid", "sticky", "link", "fifo", "."} {
		if st := lstat(t, filepath.Join(root, path)); st.Mtim.Sec != testTime.Unix() {
			t.Errorf("%s has time %d", path, st.Mtim.Sec)
		}
	}
	if st := lstat(t, root+"/link"); st.Uid != 3 && nstest.IDs() > 1 {
		t.Errorf("link has owner %d", st.Uid)
	}
	buf := make([]byte, 64)
	if n, err := unix.Getxattr(root+"/cap", "user.note", buf); err != nil || string(buf[:n]) != "hi" {
		t.Errorf("user.note = %q, %v", buf[:max(n, 0)], err)
	}
	if _, err := unix.Getxattr(root+"/cap", "security.capability", buf); err != nil {
		t.Errorf("security.capability: %v", err)
	}
	for _, name := range []string{"user.overlay.opaque", "user.overlay.redirect"} {
		if _, err := unix.Getxattr(root+"/overlay", name, buf); !errors.Is(err, unix.ENODATA) {
			t.Errorf("%s came from the archive: %v", name, err)
		}
	}
	if exists(root+"/null") || exists(root+"/disk") {
		t.Error("a device node was made")
	}
	var notes []string
	for _, n := range rec.Notes {
		notes = append(notes, n.What)
	}
	for _, want := range []string{"device node left out", "attribute trusted.x left out", "attribute user.overlay.opaque left out"} {
		if !strings.Contains(strings.Join(notes, "\n"), want) {
			t.Errorf("no note of %q in %q", want, notes)
		}
	}
	if rec.Root == nil || rec.Root.Mode != 0o1751 {
		t.Errorf("root = %+v", rec.Root)
	}
}

func TestOwnersOutsideTheMap(t *testing.T) {
	big := []entry{{name: "big", kind: tar.TypeReg, mode: 0o4755, uid: 1_516_583_083, gid: 205_001}, {name: "d", kind: tar.TypeDir, mode: 0o755, uid: 1 << 33}}
	root, rec, err := unpackTo(t, Config{}, big...)
	if err != nil {
		t.Fatal(err)
	}
	want := uint32(overflowID)
	if nstest.IDs() == 1 {
		want = 0
	}
	if st := lstat(t, root+"/big"); st.Uid != want || st.Mode&0o7777 != 0o4755 {
		t.Errorf("big has owner %d, mode %o", st.Uid, st.Mode)
	}
	if len(rec.Notes) != 1 || rec.Notes[0].Count != 2 || !strings.Contains(rec.Notes[0].Sample, "1516583083") {
		t.Errorf("notes = %+v", rec.Notes)
	}
	_, _, err = unpackTo(t, Config{RefuseUnmappedIDs: true}, big...)
	if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "/etc/subuid") {
		t.Errorf("with RefuseUnmappedIDs: %v", err)
	}
}

func TestWhiteouts(t *testing.T) {
	isWh := func(path string) bool {
		st := lstat(t, path)
		return isWhiteout(&st)
	}
	isOpaque := func(path string) bool {
		var b [1]byte
		n, err := unix.Getxattr(path, opaqueXattr, b[:])
		return err == nil && n == 1 && b[0] == 'y'
	}
	root, rec := mustUnpack(t,
		whiteout("a/.wh.gone"),
		dir("o", 0o755), whiteout("o/.wh..wh..opq"), file("o/new", "n"),
		whiteout("early/.wh..wh..opq"), dir("early", 0o700),
		whiteout(".wh.x"), dir("x", 0o755), file("x/inside", "i"), // x is replaced: opaque
		dir("y", 0o755), whiteout(".wh.y"), // the same, in the other order
		whiteout(".wh.z"), file("z", "file"), file("zz", "file"), whiteout(".wh.zz"),
		whiteout(".wh.deep"), file("deep/er/file", "f"),
		whiteout(".wh..wh.plnk"), whiteout(".wh..wh.aufs"),
	)
	if !isWh(root + "/a/gone") {
		t.Error("a/gone is no whiteout")
	}
	for _, d := range []string{"o", "early", "x", "y", "deep"} {
		if !isOpaque(filepath.Join(root, d)) {
			t.Errorf("%s is not opaque", d)
		}
	}
	if isOpaque(root + "/a") {
		t.Error("a is opaque")
	}
	if read(t, root+"/z") != "file" || read(t, root+"/zz") != "file" || read(t, root+"/deep/er/file") != "f" {
		t.Error("a whiteout hid what its own layer has")
	}
	if want := []string{"a", "deep", "deep/er"}; strings.Join(rec.Implied, ",") != strings.Join(want, ",") {
		t.Errorf("implied directories %v, want %v", rec.Implied, want)
	}
	entries, err := os.ReadDir(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".wh.") {
			t.Errorf("%s was made", e.Name())
		}
	}
	for _, bad := range []string{".wh.", ".wh..", ".wh...", "a/.wh..."} {
		if _, _, err := unpackTo(t, Config{}, whiteout(bad)); !errors.Is(err, ErrRefused) {
			t.Errorf("%s: %v", bad, err)
		}
	}
	if _, rec := mustUnpack(t, whiteout(".wh..wh..opq")); !rec.OpaqueRoot {
		t.Error("an opaque root was not noted")
	}
}

func TestBombsAreRefused(t *testing.T) {
	small := Config{MaxLayerBytes: 1 << 20}
	for name, raw := range map[string][]byte{
		"content":        compressLayer(t, compressedGzip, archiveOf(t, file("zeros", strings.Repeat("\x00", 2<<20)))).blob,
		"zstd":           compressLayer(t, compressedZstd, archiveOf(t, file("zeros", strings.Repeat("\x00", 2<<20)))).blob,
		"trailing bytes": compressLayer(t, compressedGzip, append(archiveOf(t, file("a", "")), make([]byte, 2<<20)...)).blob,
		"sparse file":    sparseArchive(1 << 40),
	} {
		t.Run(name, func(t *testing.T) {
			if _, _, err := unpackRaw(t, small, raw); !errors.Is(err, ErrRefused) {
				t.Errorf("error = %v", err)
			}
		})
	}
	for name, e := range map[string]entry{
		"long path":      file(strings.Repeat("d/", 2500)+"f", ""),
		"long component": file(strings.Repeat("n", 300), ""),
		"file as root":   file(".", ""),
		"under a file":   file("f/x", ""),
	} {
		t.Run(name, func(t *testing.T) {
			if _, _, err := unpackTo(t, Config{}, file("f", ""), e); err == nil {
				t.Error("no error")
			}
		})
	}
	loop := []entry{symlink("l1", "l2"), symlink("l2", "l1"), file("l1/x", "")}
	if _, _, err := unpackTo(t, Config{}, loop...); err == nil {
		t.Error("a loop of links: no error")
	}
	if _, _, err := unpackTo(t, Config{}, symlink("a", "a/b"), file("a/x", "")); err == nil {
		t.Error("a link into itself: no error")
	}
	for _, cut := range []int{1, 511, 513, 700} {
		raw := archiveOf(t, file("a", strings.Repeat("x", 1000)))
		if _, _, err := unpackRaw(t, Config{}, raw[:cut]); err == nil {
			t.Errorf("an archive of %d bytes: no error", cut)
		}
	}
}

// sparseArchive is a GNU sparse (PAX 1.0) file of the given size with four bytes at its start.
func sparseArchive(size int64) []byte {
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	body := make([]byte, 512+4)
	copy(body, "1\n0\n4\n")
	copy(body[512:], "data")
	sizes := map[string]string{"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "sparse", "GNU.sparse.realsize": itoa(size)}
	// archive/tar refuses to write GNU.sparse.* records: write the PAX header as a file of type 'x'.
	var pax bytes.Buffer
	for k, v := range sizes {
		n := len(k) + len(v) + 3
		for n != len(itoa(int64(n)))+len(k)+len(v)+3 {
			n = len(itoa(int64(n))) + len(k) + len(v) + 3
		}
		pax.WriteString(itoa(int64(n)) + " " + k + "=" + v + "\n")
	}
	buf.Write(ustar("pax", 'x', int64(pax.Len())))
	buf.Write(pax.Bytes())
	buf.Write(make([]byte, (512-pax.Len()%512)%512))
	buf.Write(ustar("GNUSparseFile.0/sparse", '0', int64(len(body))))
	buf.Write(body)
	buf.Write(make([]byte, (512-len(body)%512)%512))
	tw.Close()
	return buf.Bytes()
}

func itoa(n int64) string { return string(appendInt(nil, n)) }

func appendInt(b []byte, n int64) []byte {
	if n >= 10 {
		b = appendInt(b, n/10)
	}
	return append(b, byte('0'+n%10))
}

func ustar(name string, kind byte, size int64) []byte {
	h := make([]byte, 512)
	copy(h, name)
	octal := func(at, width int, v int64) {
		for i := width - 2; i >= 0; i-- {
			h[at+i] = byte('0' + v&7)
			v >>= 3
		}
	}
	octal(100, 8, 0o644)
	octal(108, 8, 0)
	octal(116, 8, 0)
	octal(124, 12, size)
	octal(136, 12, testTime.Unix())
	h[156] = kind
	copy(h[257:], "ustar\x0000")
	copy(h[148:], "        ")
	var total int64
	for _, b := range h {
		total += int64(b)
	}
	octal(148, 7, total)
	h[154] = 0
	h[155] = ' '
	return h
}

func TestSparseFilesKeepTheirHoles(t *testing.T) {
	root, rec, err := unpackRaw(t, Config{}, sparseArchive(64<<20))
	if err != nil {
		t.Fatal(err)
	}
	st := lstat(t, root+"/sparse")
	if st.Size != 64<<20 || st.Blocks*512 > 1<<20 {
		t.Errorf("size %d in %d blocks", st.Size, st.Blocks)
	}
	if rec.Bytes > 1<<20 {
		t.Errorf("counted %d bytes", rec.Bytes)
	}
	if got := read(t, root+"/sparse"); got[:8] != "data\x00\x00\x00\x00" {
		t.Errorf("content begins %q", got[:8])
	}
}

func TestDigestsAreVerified(t *testing.T) {
	s := openStore(t, Config{})
	l := gzipLayer(t, file("a", "b"))
	good := layerWant{DiffID: l.diffID, Digest: sum(l.blob), Size: int64(len(l.blob))}
	for name, c := range map[string]struct {
		want layerWant
		blob []byte
	}{
		"digest":    {layerWant{good.DiffID, sum([]byte("x")), good.Size}, l.blob},
		"diffID":    {layerWant{sum([]byte("x")), good.Digest, good.Size}, l.blob},
		"too long":  {layerWant{good.DiffID, good.Digest, good.Size - 1}, l.blob},
		"too short": {layerWant{good.DiffID, good.Digest, good.Size + 1}, l.blob},
		"trailing":  {layerWant{good.DiffID, good.Digest, -1}, append(bytes.Clone(l.blob), l.blob...)},
	} {
		_, err := s.unpackLayer(context.Background(), t.TempDir(), c.want, s.newRoom(), bytes.NewReader(c.blob))
		if !errors.Is(err, ErrDigest) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := s.unpackLayer(context.Background(), t.TempDir(), good, s.newRoom(), bytes.NewReader(l.blob)); err != nil {
		t.Error(err)
	}
}

// FuzzUnpack feeds arbitrary bytes to the whole chain: nothing may be reached outside of the root.
func FuzzUnpack(f *testing.F) {
	for _, entries := range [][]entry{
		{file("../../x", "x"), symlink("l", "/"), file("l/y", "y"), hardlink("h", "l/y")},
		{whiteout("a/.wh.b"), dir("a", 0o755), whiteout("a/.wh..wh..opq"), file("a/b/c", "d")},
		{symlink("a", "b/c"), symlink("b", "a/.."), file("a/x", ""), dir("a", 0o700), hardlink("b", "a")},
	} {
		raw := archiveOf(f, entries...)
		f.Add(raw)
		f.Add(compressLayer(f, compressedGzip, raw).blob)
		f.Add(compressLayer(f, compressedZstd, raw).blob)
	}
	f.Add(sparseArchive(1 << 20))
	s := openStore(f, Config{MaxLayerBytes: 1 << 22})
	f.Fuzz(func(t *testing.T, raw []byte) {
		outside := t.TempDir()
		if err := os.Mkdir(filepath.Join(outside, "layer"), 0o755); err != nil {
			t.Fatal(err)
		}
		_, err := s.unpackLayer(context.Background(), filepath.Join(outside, "layer"), layerWant{DiffID: sum(raw), Size: int64(len(raw)), Digest: sum(raw)}, s.newRoom(), bytes.NewReader(raw))
		if entries, readErr := os.ReadDir(outside); readErr != nil || len(entries) != 1 {
			t.Fatalf("reached outside: %v, %v (%v)", entries, readErr, err)
		}
	})
}

// Parts of names and kinds of entries, of which FuzzEntries makes archives that the tar reader takes.
var (
	fuzzParts = []string{"a", "b", "c", "l", "..", ".", "", "/", ".wh.a", ".wh.b", ".wh.", ".wh..", ".wh...", ".wh..wh..opq", ".wh..wh.x", "a\xff", "proc", "self", "fd", "0"}
	fuzzKinds = []byte{tar.TypeReg, tar.TypeDir, tar.TypeSymlink, tar.TypeLink, tar.TypeFifo, tar.TypeChar, tar.TypeDir, tar.TypeReg}
)

// fuzzEntries reads a script: for each entry its kind, how many parts name and link have, and those.
func fuzzEntries(script []byte) []entry {
	next := func() int {
		if len(script) == 0 {
			return 0
		}
		b := script[0]
		script = script[1:]
		return int(b)
	}
	path := func(parts int) string {
		var out []string
		for range parts {
			out = append(out, fuzzParts[next()%len(fuzzParts)])
		}
		return strings.Join(out, "/")
	}
	var entries []entry
	for len(script) > 0 && len(entries) < 200 {
		head := next()
		e := entry{kind: fuzzKinds[head%len(fuzzKinds)], mode: int64(0o700 | head&0o77), name: path(1 + head>>3&3), pax: map[string]string{"X.a": "b"}}
		if e.kind == tar.TypeSymlink || e.kind == tar.TypeLink {
			e.link = path(1 + head>>5)
		}
		if e.kind != tar.TypeDir && strings.HasSuffix("/"+e.name, "/") {
			e.name += "f" // the tar writer takes a slash at the end from directories alone
		}
		if e.kind == tar.TypeReg {
			e.body = "x"
		}
		entries = append(entries, e)
	}
	return entries
}

// FuzzEntries unpacks archives of names and links that lead about, then does to the layer what the store does to it:
// writes it out, copies it, removes it.
func FuzzEntries(f *testing.F) {
	f.Add([]byte{2, 3, 4, 0, 8, 3, 0})
	f.Add([]byte{1, 0, 8, 0, 1, 0, 0, 0, 9, 0, 2, 11, 3, 0, 0})
	f.Add([]byte{8, 12, 0, 1, 0, 8, 0, 12, 9, 13, 0})
	s := openStore(f, Config{MaxLayerBytes: 1 << 20})
	f.Fuzz(func(t *testing.T, script []byte) {
		outside := t.TempDir()
		dir, copied := filepath.Join(outside, "layer"), filepath.Join(outside, "copy")
		for _, d := range []string{dir, filepath.Join(copied, "merged"), filepath.Join(copied, "upper")} {
			if err := os.MkdirAll(d, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		raw := archiveOf(t, fuzzEntries(script)...)
		rec, err := s.unpackLayer(context.Background(), dir, layerWant{DiffID: sum(raw), Size: -1}, s.newRoom(), bytes.NewReader(raw))
		diff := filepath.Join(dir, "diff")
		if err != nil {
			if !errors.Is(err, ErrRefused) && !errors.Is(err, ErrCorrupt) {
				t.Errorf("error without a class: %v", err)
			}
		} else {
			for _, name := range rec.impliedDirs() {
				if !rec.implies(name) {
					t.Errorf("%q is implied, and is not", name)
				}
			}
			err = errors.Join(writeOut(context.Background(), diff), copyRootfs(context.Background(), copied, []string{diff, diff}, true))
		}
		if err != nil && rec != nil {
			t.Errorf("the layer cannot be used: %v", err)
		}
		for _, tree := range []string{diff, filepath.Join(copied, "merged")} {
			if err := os.RemoveAll(tree); err != nil {
				t.Error(err)
			}
		}
		for d, want := range map[string]string{outside: "copy layer", dir: "", copied: "upper"} {
			entries, err := os.ReadDir(d)
			var names []string
			for _, e := range entries {
				names = append(names, e.Name())
			}
			if got := strings.Join(names, " "); got != want || err != nil {
				t.Fatalf("%s has %q, want %q: reached outside; %v", d, got, want, err)
			}
		}
	})
}
