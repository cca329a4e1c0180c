// Command repin changes one constant of critest's, in a copy of its module: `repin MODULE/pkg/validate/consts.go`.
//
// One spec pulls an image by a digest that critest has as a constant, and whose content only its makers have. The
// digest of the tests' own image takes its place; nothing else of critest differs from its module.
package main

import (
	"fmt"
	"os"
	"regexp"

	"github.com/coracle-cri/coracle/e2e/fixture"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: repin FILE")
		os.Exit(2)
	}
	if err := repin(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "repin:", err)
		os.Exit(1)
	}
}

// constant is the beginning of the line that is changed, and the digest at its end.
var constant = regexp.MustCompile(`(testLinuxImageWithDigest += registry \+ "test-image-digest@)sha256:[0-9a-f]{64}"`)

func repin(file string) error {
	source, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if n := len(constant.FindAll(source, -1)); n != 1 {
		return fmt.Errorf("%s has %d constants with the digest of an image, want one", file, n)
	}
	image, err := fixture.DigestImage()
	if err != nil {
		return err
	}
	digest, err := image.Digest()
	if err != nil {
		return err
	}
	return os.WriteFile(file, constant.ReplaceAll(source, []byte("${1}"+digest.String()+`"`)), 0o600)
}
