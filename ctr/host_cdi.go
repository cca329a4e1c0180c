package ctr

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"

	"tags.cncf.io/container-device-interface/pkg/cdi"
	"tags.cncf.io/container-device-interface/pkg/parser"
	cdispecs "tags.cncf.io/container-device-interface/specs-go"
)

// CDIEdits reads the specifications anew at each call: the library's other way is a goroutine that watches the
// directories, for something that few containers ask for.
func (nodeFS) CDIEdits(dirs, devices []string) (*cdispecs.ContainerEdits, error) {
	if len(dirs) == 0 {
		return nil, invalid("CDI device %s: this node has no directory of specifications (configuration key cdiSpecDirs)", devices[0])
	}
	readable, trouble := readableDirs(dirs)
	var cache *cdi.Cache
	if len(readable) > 0 { // the library takes none for its defaults
		var err error
		if cache, err = cdi.NewCache(cdi.WithAutoRefresh(false), cdi.WithSpecDirs(readable...)); err != nil {
			return nil, fmt.Errorf("read CDI specifications: %w", err)
		}
	}
	var edits *cdi.ContainerEdits
	var seen []*cdi.Spec
	for _, name := range devices {
		device, err := findCDI(cache, name, dirs, trouble)
		if err != nil {
			return nil, err
		}
		// What a specification says of all its devices counts once, before what it says of one.
		if spec := device.GetSpec(); !slices.Contains(seen, spec) {
			seen = append(seen, spec)
			edits = edits.Append(&cdi.ContainerEdits{ContainerEdits: &spec.ContainerEdits})
		}
		edits = edits.Append(&cdi.ContainerEdits{ContainerEdits: &device.ContainerEdits})
	}
	return edits.ContainerEdits, nil
}

// readableDirs leaves out what is not there, and tells what cannot be read: the library would stop at it, and know
// nothing of the directories behind.
func readableDirs(dirs []string) (readable, trouble []string) {
	for _, dir := range dirs {
		switch _, err := os.ReadDir(dir); {
		case err == nil:
			readable = append(readable, dir)
		case !errors.Is(err, fs.ErrNotExist):
			trouble = append(trouble, err.Error())
		}
	}
	return readable, trouble
}

// findCDI names the device, where it was looked for, and what is wrong there.
func findCDI(cache *cdi.Cache, name string, dirs, trouble []string) (*cdi.Device, error) {
	if _, _, _, err := parser.ParseQualifiedName(name); err != nil {
		return nil, invalid("CDI device %q: its name is not VENDOR/CLASS=DEVICE: %w", name, err)
	}
	if cache != nil {
		if device := cache.GetDevice(name); device != nil {
			return device, nil
		}
		all := cache.GetErrors()
		for _, path := range slices.Sorted(maps.Keys(all)) {
			trouble = append(trouble, fmt.Sprintf("%s: %v", path, errors.Join(all[path]...)))
		}
	}
	sentence := fmt.Sprintf("no CDI specification in %s describes it", strings.Join(dirs, ", "))
	if len(trouble) > 0 {
		sentence += "; what could not be used: " + strings.Join(trouble, "; ")
	}
	return nil, invalid("CDI device %s: %s", name, sentence)
}
