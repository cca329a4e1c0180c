package settle

import (
	"bytes"
	"os"
	"strconv"
	"testing"
)

// mappedKB is how much of files is in this process's memory.
func mappedKB(t *testing.T) (kb int) {
	t.Helper()
	raw, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range bytes.Lines(raw) {
		if value, found := bytes.CutPrefix(line, []byte("RssFile:")); found {
			kb, err = strconv.Atoi(string(bytes.Fields(value)[0]))
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	return kb
}

func TestTheProgramIsDroppedAndComesBack(t *testing.T) {
	before := mappedKB(t)
	if err := dropProgram("/proc/self/exe"); err != nil {
		t.Fatal(err)
	}
	after := mappedKB(t)
	if after >= before {
		t.Errorf("%d KB of files before, %d after", before, after)
	}
	if n, err := strconv.ParseFloat("1.5e300", 64); err != nil || n != 1.5e300 { // code and tables that were not there
		t.Error(n, err)
	}
}

func TestWhatIsNoProgramIsRefused(t *testing.T) {
	if err := dropProgram("/proc/self/status"); err == nil {
		t.Error("a text was taken for a program")
	}
}
